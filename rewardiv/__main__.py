"""`python -m rewardiv`."""

from __future__ import annotations

import sys

from rewardiv.cli import main

sys.exit(main())

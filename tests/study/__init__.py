"""Tests of the user study; a package, so that its conftest has a name of its own."""

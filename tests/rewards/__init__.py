"""Tests of the rewards people have; a package, so that its conftest has a name of its own."""

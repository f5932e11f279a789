"""Tests; a package, so that another one of this name in an environment (torch-fidelity installs one) is not taken for it."""

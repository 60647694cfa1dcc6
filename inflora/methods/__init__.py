"""Continual-learning methods: `inflora/methods/<name>.py` holds the one class that `conf/method/<name>.yaml` points at."""

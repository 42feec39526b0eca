import dwl_plugin.config  # noqa: F401  # until schedules.py lies below it

"""Programs that other processes run are no tests."""

collect_ignore = ["cases.py", "deepspeed_cases.py"]

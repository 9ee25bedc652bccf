"""`python -m peft_childtune.cli`, the same as `childtune`."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()

"""PEFT's own tests as the judge of ``fastprefix.patch``: ``python -m tests.peft_suite`` (``make test-peft``)."""

"""The programs: what connects the core to the broker and to people."""

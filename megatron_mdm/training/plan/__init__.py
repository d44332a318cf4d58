"""What a run would take, before it is paid for: memory, communication, time."""

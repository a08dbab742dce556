"""What a text must look like, by llguidance: checked in a process that may be killed, obeyed token by token."""

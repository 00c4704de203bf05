"""What a request may touch (sandbox.md)."""

"""Other attribution tools beside ours, on one machine."""

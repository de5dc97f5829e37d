"""Other attribution tools compared with ours, on one machine."""

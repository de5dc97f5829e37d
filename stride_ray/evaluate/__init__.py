"""How far attribution can be trusted: measurements, each with a protocol, an interval and a baseline."""

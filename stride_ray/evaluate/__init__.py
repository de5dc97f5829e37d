"""How far attribution can be trusted: measurements with a protocol, an interval and a baseline beside them."""

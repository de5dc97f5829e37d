"""Contamination scans: did evaluation items leak into a corpus, and does the model trained on it lean on the leak?

Two channels that are never mixed: words (``lexical/``), which prove a copy, and influence (``influence.py``), which
raises a suspicion and no more. ``nightly.scan`` runs both, night after night.
"""

"""Contamination scans: did evaluation items leak into a corpus, and does the model trained on it rely on the leak?

Two channels that are never mixed: lexical matches (``lexical/``) prove a copy; influence (``influence/``) only raises
a suspicion. ``nightly.scan`` runs both every night.
"""

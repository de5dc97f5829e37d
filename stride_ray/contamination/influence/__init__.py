"""The influence channel: does the model depend on one block for an item more than for control items?"""

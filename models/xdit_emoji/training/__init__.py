"""How the weights of the emoji model were made; run in the order data, vae, transformer, evaluate.

None of this is imported when the model is used.
"""

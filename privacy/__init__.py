"""Mathematics of privacy: numpy and cryptography, torch only inside `dp_sgd`.

Import its modules by name: this file imports nothing, so that the server never reaches torch.
"""

"""DP-SGD on tensors: clip, add up, add noise. It knows no model; the only room here with torch.

Source: Abadi et al., "Deep learning with differential privacy" (arXiv 1607.00133), algorithm 1.
"""

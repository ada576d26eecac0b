"""Who holds which records: partition schemes, manifests that record them, a figure of them."""

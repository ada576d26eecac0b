"""Double-masked secure aggregation as two pure state machines: message in, actions out.

No clock, no I/O, no vectors: `agent` and `server` hold messages, keys and seeds. The masks are in
`privacy.masking`. Import the modules by name.

Source: Bonawitz et al., "Practical Secure Aggregation", CCS 2017, in the variant for a malicious
server (a signed roster and a round of consistency), in cells as in SHARE, arXiv 2110.02940.
"""

"""Audits: lower bounds on ε, and attacks that find what trained an update, from arrays of numbers.

| function | asks | its bound on ε |
| --- | --- | --- |
| `one_run.one_run_bound` | which canaries did a run have? | if fair coins chose them |
| `membership.membership_inference` | which examples had a release? | if scores are independent |
| `probes.subspace_distance` | which tokens did an update have? | none: it names the tokens |
| `probes.cosine_scores` | which examples did an update have? | none: scores for the first two |

Here are numbers only, neither models nor torch.
"""

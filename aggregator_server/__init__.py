"""The operator's program: enrols agents, runs rounds, averages updates, publishes releases.

It never imports torch, so that it runs on a small cloud machine.
"""

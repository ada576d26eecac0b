"""Runs of many virtual agents over one base; trained, summed and averaged by shipped code."""

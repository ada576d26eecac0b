"""Attacks on a federation: what members who mean harm, or do nothing, send and train on."""

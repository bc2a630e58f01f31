"""Composes the components into the loop: wiring, mapping, Prefect flows, the command line.

Nobody imports this folder.
"""

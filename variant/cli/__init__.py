"""The command line ``variant``; ``variant.cli.entry`` starts it, ``variant.cli.main`` runs it.

Imports nothing: entry.py must install its signal handlers before anything slow is imported.
"""

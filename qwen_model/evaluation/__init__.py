"""Measure engines: how well they predict a text, and where their time goes."""

"""Conversion of weights files of other frameworks to models of keras.applications."""

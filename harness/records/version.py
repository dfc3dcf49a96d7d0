"""The version of the harness, which every record names."""

VERSION = "0.1.0"

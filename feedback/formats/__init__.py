"""What others write, as our own interactions and feedback: files to import, traces to receive.

Pure. `reading` takes the lines of a file, `otlp` a trace export; storing is left to others.
"""

"""What csipipe does on a GPU, measured in minutes, on one page: `python -m csipipe gpucheck`.

Every step runs in a process of its own with a limit; the page is written anew after each, so that
what was found stays when the rest is cut short.
"""

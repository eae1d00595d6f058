"""Command line: `aigc-tf demo | train | estimate | tune | evaluate | generate | info`.

In: the words of a shell command. Out: the results of the public functions as text; errors in one line.
"""

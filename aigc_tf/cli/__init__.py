"""The command line: `aigc-tf demo | train | estimate | tune | evaluate | generate | info`.

In: words typed in a shell. Out: what the public functions give, as text; errors as one line.
"""

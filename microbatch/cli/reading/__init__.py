"""The input of commands that ask about files: formats, records, and the questions made of them."""

"""Answers that were paid for once: how they are filed, where they are kept, who else may have them."""

"""`serve --workers N`: several processes behind one port.

The supervisor alone listens. It accepts each connection and hands it to the worker that has fewest, so that they have equally many;
processes that accept from one socket, or from several on one port, get uneven shares, and lose the connections that wait to be
accepted when they end. A worker that has ended is replaced. Workers end when the supervisor does.
"""

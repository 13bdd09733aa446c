"""Doubles for tests, users' included: a scripted transport, a virtual clock, a simulated endpoint."""

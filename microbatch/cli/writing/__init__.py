"""The output of commands: the journal of a run, the formats written from it, joins and exports."""

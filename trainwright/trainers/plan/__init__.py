"""Plans: what a run would do on machines that aren't at hand."""

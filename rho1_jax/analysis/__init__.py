"""What a run shows: the report and the pages of marked tokens."""

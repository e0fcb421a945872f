"""Many texts in one context, decoded side by side: `scheduler.Sequences`."""

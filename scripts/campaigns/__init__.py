"""Campaigns against the library: broken and hostile input, kills, and what precision costs."""

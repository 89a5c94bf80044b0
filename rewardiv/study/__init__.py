"""The user study: sets of images, blind ballots, votes that are kept, and what they say."""

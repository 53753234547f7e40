"""Generated users in LaMP's format, with known preferences; a null population without any.

Reading order: `words` and `language` (texts), `preferences` (what users like), `forms` and `drafts`
(items and queries), `generate` (populations).
"""

from fedoppu.simulations.population.generate import Population, generate, stream_users

__all__ = ["Population", "generate", "stream_users"]

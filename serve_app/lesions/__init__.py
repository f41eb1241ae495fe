"""The way of one lesion: assessed, recorded, recovered, replayed, compared with like cases."""

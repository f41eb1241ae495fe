"""The CDS Hooks service: which EHR calls, whom it means, and the cards that it is given."""

"""Who may do what: tokens, the issuer's keys, rules, and how often one may ask."""

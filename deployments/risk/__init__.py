"""From everything the other stages found to an outcome, a risk level and a referral urgency."""

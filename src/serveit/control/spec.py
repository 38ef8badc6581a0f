"""What a deploy asks for, as a record that travels to the controller and into its checkpoint."""

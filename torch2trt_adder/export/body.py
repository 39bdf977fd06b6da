"""The body of the node Adder2d in standard operators, for runtimes without the plugin."""

# The operator in standard ones. The outer Scan runs over the samples and the inner one over the filters of a group, so
# that besides one sample's taps only one filter's terms are in memory. Taps are gathered, not multiplied by a kernel of
# ones, which would turn an infinity into NaN. Sums are float32 whatever the type of x.
BODY = """
<domain: "torch2trt_adder", opset_import: ["" : %d], doc_string: "y = bias - sum over c,r,s of |x - weight|">
Adder2d <stride, padding, dilation, groups, output_type> (x, weight, bias) => (y)
{
  step = Constant <value_ints: ints = @stride> ()
  pad = Constant <value_ints: ints = @padding> ()
  reach = Constant <value_ints: ints = @dilation> ()
  group = Constant <value_int: int = @groups> ()
  first = Constant <value_int = 0> ()
  second = Constant <value_int = 1> ()
  one = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  none = Constant <value_ints = [0, 0]> ()
  map_axes = Constant <value_ints = [1, 2]> ()

  pads = Concat <axis = 0> (none, pad, none, pad)
  x_float = Cast <to = 1> (x)
  padded = Pad (x_float, pads)

  N = Shape <start = 0, end = 1> (x)
  K = Shape <start = 0, end = 1> (weight)
  image = Shape <start = 2> (padded)
  RS = Shape <start = 2> (weight)
  span = Sub (RS, one)
  span_dilated = Mul (span, reach)
  room = Sub (image, span_dilated)
  room_less_one = Sub (room, one)
  steps = Div (room_less_one, step)
  PQ = Add (steps, one)

  R = Gather (RS, first)
  S = Gather (RS, second)
  P = Gather (PQ, first)
  Q = Gather (PQ, second)
  stride_h = Gather (step, first)
  stride_w = Gather (step, second)
  dilation_h = Gather (reach, first)
  dilation_w = Gather (reach, second)
  r = Range (first, R, second)
  s = Range (first, S, second)
  p = Range (first, P, second)
  q = Range (first, Q, second)
  r_dilated = Mul (r, dilation_h)
  r_column = Unsqueeze (r_dilated, one)
  p_strided = Mul (p, stride_h)
  rows = Add (r_column, p_strided)
  s_dilated = Mul (s, dilation_w)
  s_column = Unsqueeze (s_dilated, one)
  q_strided = Mul (q, stride_w)
  columns = Add (s_column, q_strided)

  groups_1d = Reshape (group, one)
  filter_size = Shape <start = 1> (weight)
  CRS = ReduceProd <keepdims = 1> (filter_size)
  taps_shape = Concat <axis = 0> (groups_1d, CRS, rest)
  filters_shape = Concat <axis = 0> (groups_1d, rest, CRS, one)
  weight_float = Cast <to = 1> (weight)
  filters_of_groups = Reshape (weight_float, filters_shape)
  filters = Transpose <perm = [1, 0, 2, 3]> (filters_of_groups)

  distances = Scan <num_scan_inputs = 1, body = of_sample (sample) => (sample_maps) {
    sample_rows = Gather <axis = 1> (sample, rows)
    sample_taps = Gather <axis = 3> (sample_rows, columns)
    sample_taps_first = Transpose <perm = [0, 1, 3, 2, 4]> (sample_taps)
    taps = Reshape (sample_taps_first, taps_shape)
    sample_maps = Scan <num_scan_inputs = 1, scan_output_axes = [1], body = of_filter (filter) => (filter_map) {
      difference = Sub (taps, filter)
      distance = Abs (difference)
      filter_map = ReduceSum <keepdims = 0> (distance, one)
    }> (filters)
  }> (padded)

  y_shape = Concat <axis = 0> (N, K, PQ)
  maps = Reshape (distances, y_shape)
  negative = Neg (maps)
  bias_float = Cast <to = 1> (bias)
  bias_maps = Unsqueeze (bias_float, map_axes)
  y_float = Add (negative, bias_maps)
  y = CastLike (y_float, x)
}
"""

/** Where a view's pixels come from in the clean image. All matrices take continuous pixel coordinates: (0, 0) is the
 * corner of the first pixel. Formulas: views/parameters in docs/format.md, and Pillow's `transform` and `rotate`. */

export interface Box {
  left: number;
  top: number;
  width: number;
  height: number;
}

export interface Size {
  width: number;
  height: number;
}

export type Parameters = Record<string, number>;

// Positions in the format's list of operations, see atcache/views/randaugment.py.
const OPERATIONS = [
  "auto contrast",
  "equalize",
  "invert",
  "rotation",
  "posterize",
  "solarize",
  "solarize add",
  "colour",
  "contrast",
  "brightness",
  "sharpness",
  "shear x",
  "shear y",
  "shift x",
  "shift y",
];

/** The matrix from a point of the view to the point of the clean image that it shows: the operations are undone from
 * the last to the first, then flip, window, resize and crop. */
export function viewToSource(drawn: Parameters, view: Size): DOMMatrix {
  const across = drawn.crop_width! / drawn.resize_width!;
  const down = drawn.crop_height! / drawn.resize_height!;
  const matrix = new DOMMatrix()
    .translate(drawn.crop_left, drawn.crop_top)
    .scale(across, down)
    .translate(drawn.window_left, drawn.window_top);
  if (drawn.flip) matrix.multiplySelf(new DOMMatrix([-1, 0, 0, 1, view.width, 0]));
  matrix.multiplySelf(operationMatrix(drawn.operation_1!, drawn.argument_1!, view));
  return matrix.multiplySelf(operationMatrix(drawn.operation_2!, drawn.argument_2!, view));
}

/** From a point after an operation to the point before it; colours do not move. */
function operationMatrix(position: number, argument: number, view: Size): DOMMatrix {
  switch (OPERATIONS[position]) {
    case "rotation": {
      const matrix = new DOMMatrix().translate(view.width / 2, view.height / 2);
      return matrix.rotate(argument).translate(-view.width / 2, -view.height / 2);
    }
    case "shear x":
      return new DOMMatrix([1, 0, argument, 1, 0, 0]);
    case "shear y":
      return new DOMMatrix([1, argument, 0, 1, 0, 0]);
    case "shift x":
      return new DOMMatrix([1, 0, 0, 1, argument * view.width, 0]);
    case "shift y":
      return new DOMMatrix([1, 0, 0, 1, 0, argument * view.height]);
    default:
      return new DOMMatrix();
  }
}

/** The box of the view that another sample's view covers (CutMix). */
export function partnerBox(drawn: Parameters): Box | null {
  if (!drawn.mix_partner || !drawn.mix_height) return null;
  return { left: drawn.mix_left!, top: drawn.mix_top!, width: drawn.mix_width!, height: drawn.mix_height };
}

/** The box of the view that noise covers. */
export function erasedBox(drawn: Parameters): Box | null {
  if (!drawn.erase_height) return null;
  return { left: drawn.erase_left!, top: drawn.erase_top!, width: drawn.erase_width!, height: drawn.erase_height };
}

/** What was done to a view, in words. */
export function describeView(drawn: Parameters): string {
  const words = [`crop ${drawn.crop_width} × ${drawn.crop_height}`];
  if (drawn.flip) words.push("flipped");
  for (const number of [1, 2]) {
    const name = OPERATIONS[drawn[`operation_${number}`]!];
    if (name) words.push(name);
  }
  if (drawn.erase_height) words.push("a box erased");
  if (drawn.mix_partner) {
    const share = Math.round((1 - drawn.mix_share!) * 100);
    words.push(drawn.mix_height ? `${share} % pasted from another sample` : `mixed with ${share} % of another sample`);
  }
  return words.join(", ");
}

/** Colours, erased boxes and other samples are not in a view that is drawn from the clean image. */
export function isDrawable(drawn: Parameters): boolean {
  const moves = [-1, 3, 11, 12, 13, 14];
  return !drawn.erase_height && !drawn.mix_partner && [1, 2].every((n) => moves.includes(drawn[`operation_${n}`]!));
}
